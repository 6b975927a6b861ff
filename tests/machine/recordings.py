"""What tools printed on real machines, from public reports; the address stands above each. `[...]`: lines left out."""

# https://github.com/NVIDIA/nccl-tests/issues/307: 8 RTX 4090 on two sockets, tabs as nvidia-smi prints them
TOPO_4090 = (
    "\tGPU0\tGPU1\tGPU2\tGPU3\tGPU4\tGPU5\tGPU6\tGPU7\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    "GPU0\t X \tPIX\tPIX\tPIX\tSYS\tSYS\tSYS\tSYS\tPIX\t0-35,72-107\t0\t\tN/A\n"
    "GPU1\tPIX\t X \tPIX\tPIX\tSYS\tSYS\tSYS\tSYS\tPIX\t0-35,72-107\t0\t\tN/A\n"
    "GPU2\tPIX\tPIX\t X \tPIX\tSYS\tSYS\tSYS\tSYS\tPIX\t0-35,72-107\t0\t\tN/A\n"
    "GPU3\tPIX\tPIX\tPIX\t X \tSYS\tSYS\tSYS\tSYS\tPIX\t0-35,72-107\t0\t\tN/A\n"
    "GPU4\tSYS\tSYS\tSYS\tSYS\t X \tPIX\tPIX\tPIX\tSYS\t36-71,108-143\t1\t\tN/A\n"
    "GPU5\tSYS\tSYS\tSYS\tSYS\tPIX\t X \tPIX\tPIX\tSYS\t36-71,108-143\t1\t\tN/A\n"
    "GPU6\tSYS\tSYS\tSYS\tSYS\tPIX\tPIX\t X \tPIX\tSYS\t36-71,108-143\t1\t\tN/A\n"
    "GPU7\tSYS\tSYS\tSYS\tSYS\tPIX\tPIX\tPIX\t X \tSYS\t36-71,108-143\t1\t\tN/A\n"
    "NIC0\tPIX\tPIX\tPIX\tPIX\tSYS\tSYS\tSYS\tSYS\t X\n"
    "\nLegend:\n\n  X    = Self\n"
    "  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)\n"
    "\nNIC Legend:\n\n  NIC0: mlx5_bond_0\n"
)

# https://github.com/NVIDIA/nccl/issues/1439: pairs under one bridge, copied from a terminal (spaces)
TOPO_PAIRS = """\
        GPU0    GPU1    GPU2    GPU3    GPU4    GPU5    GPU6    GPU7    CPU Affinity    NUMA Affinity   GPU NUMA ID
GPU0     X      PIX     PHB     PHB     SYS     SYS     SYS     SYS     0-13,28-41      0               N/A
GPU1    PIX      X      PHB     PHB     SYS     SYS     SYS     SYS     0-13,28-41      0               N/A
GPU2    PHB     PHB      X      PIX     SYS     SYS     SYS     SYS     0-13,28-41      0               N/A
GPU3    PHB     PHB     PIX      X      SYS     SYS     SYS     SYS     0-13,28-41      0               N/A
GPU4    SYS     SYS     SYS     SYS      X      PIX     PHB     PHB     14-27,42-55     1               N/A
GPU5    SYS     SYS     SYS     SYS     PIX      X      PHB     PHB     14-27,42-55     1               N/A
GPU6    SYS     SYS     SYS     SYS     PHB     PHB      X      PIX     14-27,42-55     1               N/A
GPU7    SYS     SYS     SYS     SYS     PHB     PHB     PIX      X      14-27,42-55     1               N/A

Legend:

  X    = Self
"""

# https://github.com/NVIDIA/nccl-tests/issues/29: V100 with NVLink between some, interfaces by name (an old driver)
TOPO_V100 = """\
        GPU0    GPU1    GPU2    GPU3    GPU4    GPU5    GPU6    GPU7    mlx5_0  mlx5_1  CPU Affinity
GPU0     X      NV2     NV2     NV1     NV1     SYS     SYS     SYS     NODE    NODE    0-23,48-71
GPU1    NV2      X      NV1     NV2     SYS     NV1     SYS     SYS     NODE    NODE    0-23,48-71
GPU2    NV2     NV1      X      NV1     SYS     SYS     NV2     SYS     PIX     PIX     0-23,48-71
GPU3    NV1     NV2     NV1      X      SYS     SYS     SYS     NV2     PIX     PIX     0-23,48-71
GPU4    NV1     SYS     SYS     SYS      X      NV2     NV2     NV1     SYS     SYS     24-47,72-95
GPU5    SYS     NV1     SYS     SYS     NV2      X      NV1     NV2     SYS     SYS     24-47,72-95
GPU6    SYS     SYS     NV2     SYS     NV2     NV1      X      NV1     SYS     SYS     24-47,72-95
"""

# https://github.com/NVIDIA/nccl/issues/667: PXB and PIX, a plain table of four
TOPO_FOUR = (
    "\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\tNUMA Affinity\n"
    "GPU0\t X \tPXB\tSYS\tSYS\t0-27,56-83\t0\n"
    "GPU1\tPXB\t X \tSYS\tSYS\t0-27,56-83\t0\n"
    "GPU2\tSYS\tSYS\t X \tPIX\t28-55,84-111\t1\n"
    "GPU3\tSYS\tSYS\tPIX\t X \t28-55,84-111\t1\n"
)

# https://github.com/noonghunna/club-3090/issues/1229: two RTX 5090
TOPO_5090 = (
    "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    "GPU0\t X \tPHB\t0-63\t0\t\tN/A\n"
    "GPU1\tPHB\t X \t0-63\t0\t\tN/A\n"
    "\nLegend:\n\n  X    = Self\n"
)
P2P_5090 = (
    " \tGPU0\tGPU1\t\n GPU0\tX\tGNS\t\n GPU1\tGNS\tX\t\n\nLegend:\n\n  X    = Self\n  OK   = Status Ok\n"
    "  CNS  = Chipset not supported\n  GNS  = GPU not supported\n"
)

# https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting/gpu_troubleshooting.html
P2P_HEALTHY = """\
          GPU0    GPU1    GPU2    GPU3    GPU4    GPU5    GPU6    GPU7
GPU0      X       OK      OK      OK      OK      OK      OK      OK
GPU1      OK      X       OK      OK      OK      OK      OK      OK
GPU2      OK      OK      X       OK      OK      OK      OK      OK
GPU3      OK      OK      OK      X       OK      OK      OK      OK
GPU4      OK      OK      OK      OK      X       OK      OK      OK
GPU5      OK      OK      OK      OK      OK      X       OK      OK
GPU6      OK      OK      OK      OK      OK      OK      X       OK
GPU7      OK      OK      OK      OK      OK      OK      OK      X
"""

# https://github.com/akash-network/provider-configs/pull/99: two L40S in a ThinkSystem SR665 V3
CSV_L40S = """\
name, driver_version, memory.total [MiB], pci.bus_id, pci.device_id
NVIDIA L40S, 595.71.05, 46068 MiB, 00000000:01:00.0, 0x26B910DE
NVIDIA L40S, 595.71.05, 46068 MiB, 00000000:91:00.0, 0x26B910DE
"""

# https://github.com/isaac-sim/IsaacSim/issues/228: one L40S
SMI_Q_L40S = """\
Attached GPUs                             : 1
GPU 00000000:34:00.0
    Product Name                          : NVIDIA L40S
    Product Brand                         : NVIDIA
    Product Architecture                  : Ada Lovelace
    Display Mode                          : Enabled
    Display Active                        : Disabled
    Persistence Mode                      : Enabled
    Addressing Mode                       : HMM
    MIG Mode
        Current                           : N/A
        Pending                           : N/A
    Accounting Mode                       : Disabled
    Accounting Mode Buffer Size           : 4000
    Driver Model
        Current                           : N/A
        Pending                           : N/A
    Serial Number                         : 1651624010662
"""

# https://github.com/bigstack-oss/cubecos/issues/312: RTX PRO 6000, `nvidia-smi -q -d MEMORY,PERFORMANCE`
SMI_Q_PRO6000 = """\

==============NVSMI LOG==============

Timestamp                                 : Wed Jan 14 15:17:09 2026
Driver Version                            : 580.105.06
CUDA Version                              : Not Found
vGPU Driver Capability
        Heterogenous Multi-vGPU           : Supported

Attached GPUs                             : 4
GPU 00000000:42:00.0
    Performance State                     : P8
    Clocks Event Reasons
        Idle                              : Not Active
        HW Slowdown                       : Not Active
            HW Thermal Slowdown           : Not Active
        Sync Boost                        : Not Active
    Clocks Event Reasons Counters
        SW Power Capping                  : 1202176 us
"""

# https://github.com/sebhildebrandt/systeminformation/issues/819: bridges of an AMD board, ACS on; run as root
LSPCI_AMD = (
    "00:01.2 PCI bridge: Advanced Micro Devices, Inc. [AMD] Starship/Matisse GPP Bridge (prog-if 00 [Normal decode])\n"
    "\tSubsystem: ASUSTeK Computer Inc. Starship/Matisse GPP Bridge\n"
    "[...]\n"
    "\tCapabilities: [2a0 v1] Access Control Services\n"
    "\t\tACSCap:\tSrcValid+ TransBlk+ ReqRedir+ CmpltRedir+ UpstreamFwd+ EgressCtrl- DirectTrans+\n"
    "\t\tACSCtl:\tSrcValid+ TransBlk- ReqRedir+ CmpltRedir+ UpstreamFwd+ EgressCtrl- DirectTrans-\n"
    "\tCapabilities: [370 v1] L1 PM Substates\n"
    "\t\tL1SubCap: PCI-PM_L1.2- PCI-PM_L1.1+ ASPM_L1.2- ASPM_L1.1+ L1_PM_Substates+\n"
    "\tKernel driver in use: pcieport\n"
    "\n"
    "00:02.0 Host bridge: Advanced Micro Devices, Inc. [AMD] Starship/Matisse PCIe Dummy Host Bridge\n"
    "\tDeviceName:  Onboard IGD\n"
    "\tStatus: Cap- 66MHz- UDF- FastB2B- ParErr- DEVSEL=fast >TAbort- <TAbort- <MAbort- >SERR- <PERR- INTx-\n"
    "\tIOMMU group: 3\n"
)

# https://github.com/microsoft/openvmm/pull/3461: a root port with ACS off (spaces; its own [...])
LSPCI_OFF = """\
00:00.0 PCI bridge: Microsoft Corporation Device c030 (prog-if 00 [Normal decode])
        Control: I/O+ Mem+ BusMaster+ SpecCycle- MemWINV- VGASnoop- ParErr- Stepping- SERR- FastB2B- DisINTx+
        Bus: primary=00, secondary=01, subordinate=08, sec-latency=0
[...]
        Capabilities: [100 v1] Access Control Services
                ACSCap: SrcValid+ TransBlk+ ReqRedir+ CmpltRedir+ UpstreamFwd+ EgressCtrl- DirectTrans+
                ACSCtl: SrcValid- TransBlk- ReqRedir- CmpltRedir- UpstreamFwd- EgressCtrl- DirectTrans-
        Kernel driver in use: pcieport
"""

# https://github.com/HeyMeco/Rockchip-pcie-devices/issues/6: a port of a PLX switch, addresses with a domain
LSPCI_PLX = """\
0000:02:08.0 PCI bridge: PLX Technology, Inc. PEX 8725 24-Lane, 10-Port PCI Express Gen 3 (8.0 GT/s) Multi-Root Switch \
with DMA (rev ca) (prog-if 00 [Normal decode])
        Subsystem: PLX Technology, Inc. PEX 8725 24-Lane, 10-Port PCI Express Gen 3 (8.0 GT/s) Multi-Root Switch \
with DMA
[...]
                ACSCap: SrcValid+ TransBlk+ ReqRedir+ CmpltRedir+ UpstreamFwd+ EgressCtrl+ DirectTrans+
                ACSCtl: SrcValid+ TransBlk- ReqRedir+ CmpltRedir+ UpstreamFwd+ EgressCtrl- DirectTrans-
        Capabilities: [b70 v1] Vendor Specific Information: ID=0001 Rev=0 Len=010 <?>
        Kernel driver in use: pcieport
"""

# https://github.com/sebhildebrandt/systeminformation/issues/184: not run as root
LSPCI_DENIED = """\
00:16.0 Communication controller: Intel Corporation Sunrise Point-H CSME HECI #1 (rev 31)
        Subsystem: Lenovo 100 Series/C230 Series Chipset Family MEI Controller
        Control: I/O- Mem+ BusMaster+ SpecCycle- MemWINV- VGASnoop- ParErr- Stepping- SERR- FastB2B- DisINTx+
        Capabilities: <access denied>
        Kernel driver in use: mei_me
"""

# https://github.com/ROCm/rccl/issues/1129
CMDLINE_PT = "BOOT_IMAGE=/vmlinuz-5.15.0-101-generic root=/dev/mapper/ubuntu--vg-ubuntu--lv ro iommu=pt\n"

# https://github.com/NVIDIA/nccl/issues/1189: two nodes of H20, GPUDirect RDMA between them
NCCL_GDR = """\
H20-GPU-06:4015539:4015652 [0] NCCL INFO Channel 07/0 : 0[0] -> 2[0] [receive] via NET/IB/3/GDRDMA
H20-GPU-06:4015540:4015653 [1] NCCL INFO Channel 00/0 : 1[1] -> 3[1] [receive] via NET/IB/2/GDRDMA
H20-GPU-06:4015540:4015653 [1] NCCL INFO Channel 01/0 : 3[1] -> 1[1] [send] via NET/IB/2/GDRDMA
H20-GPU-06:4015540:4015653 [1] NCCL INFO Channel 00/0 : 3[1] -> 2[0] via P2P/CUMEM
H20-GPU-05:1789225:1789736 [1] NCCL INFO Channel 01/0 : 1[1] -> 0[0] via P2P/CUMEM
"""

# https://github.com/NVIDIA/nccl/issues/1412: InfiniBand without GPUDirect RDMA
NCCL_NO_GDR = """\
swat1-04:2017630:2017697 [7] NCCL INFO Channel 00/0 : 7[7] -> 6[6] via P2P/direct pointer/read
swat1-04:2017630:2017699 [5] NCCL INFO Channel 03/0 : 5[5] -> 12[4] [send] via NET/IB/3
swat1-04:2017630:2017700 [4] NCCL INFO Channel 03/0 : 13[5] -> 4[4] [receive] via NET/IB/3
"""

# https://github.com/NVIDIA/nccl/issues/952: TCP between nodes
NCCL_SOCKET = """\
<cluster_name>:926:1151 [7] NCCL INFO Channel 03/0 : 15[7] -> 6[6] [send] via NET/Socket/3
<cluster_name>:922:1146 [2] NCCL INFO Channel 00/0 : 10[2] -> 9[1] via P2P/IPC/read
<cluster_name>:923:1147 [4] NCCL INFO Channel 00/0 : 12[4] -> 11[3] via P2P/IPC/read
"""

# https://github.com/NVIDIA/nccl-tests/issues/166: host memory inside a node (no `/0` behind the channel)
NCCL_SHM = """\
ubuntu:39964:40048 [4] NCCL INFO Channel 09 : 4[4] -> 3[3] via SHM/direct/direct
ubuntu:39964:40049 [5] NCCL INFO Channel 08 : 5[5] -> 4[4] via SHM/direct/direct
ubuntu:39964:40047 [3] NCCL INFO Channel 09 : 3[3] -> 2[2] via SHM/direct/direct
"""

# https://github.com/Mellanox/nv_peer_memory/issues/56: NCCL 2.4, `Ring` for `Channel`, network lines without devices
NCCL_24 = """\
master_node:20:289 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB ; OOB ib0:192.168.11.1<0>
NCCL version 2.4.7+cuda10.0
master_node:22:295 [2] NCCL INFO NCCL_IB_DISABLE set by environment to 0.
secondary_node:43:309 [2] NCCL INFO Ring 01 : 3 -> 6 [receive] via NET/IB/0
master_node:23:288 [3] NCCL INFO Ring 01 : 3[3] -> 1[1] via P2P/IPC
master_node:20:289 [0] NCCL INFO Ring 01 : 0[0] -> 2[2] via P2P/IPC
"""

# https://github.com/NVIDIA/nccl/issues/1537: NCCL says itself that it does without
NCCL_DISABLED = """\
hostname1:25668:27396 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/RoCE [1]mlx5_1:1/RoCE [RO]; OOB primaryip:10.10.10.10<0>
hostname1:25668:27396 [0] NCCL INFO Using network IB
hostname1:25668:27396 [0] NCCL INFO NET/IB : GPU Direct RDMA Disabled for HCA 0 'mlx5_0'
hostname1:25668:27396 [0] NCCL INFO NET/IB : GPU Direct RDMA Disabled for HCA 1 'mlx5_1'
"""

# https://github.com/NVIDIA/nccl/issues/707: PCI addresses where newer versions have device numbers
NCCL_BUS = """\
10-90-43-152:120890:121560 [0] NCCL INFO Channel 01 : 2[c7000] -> 0[87000] [receive] via NET/IB/5/GDRDMA
"""

# https://github.com/NVIDIA/nccl/issues/428: a warning behind a file name
NCCL_WARN = """\
ai-vtraining-prd-10-193-84-3:93569:93569 [0] misc/ibvwrap.cc:63 NCCL WARN Failed to open libibverbs.so[.1]
ai-vtraining-prd-10-193-84-3:93569:93569 [0] NCCL INFO Using network Socket
NCCL version 2.8.3+cuda10.0
"""

# https://github.com/awslabs/awsome-distributed-ai/issues/195: a drained node
SCONTROL = """\
NodeName=yigou-dev-102-68 Arch=x86_64 CoresPerSocket=1 
   CPUAlloc=0 CPUEfctv=8 CPUTot=8 CPULoad=0.99
   AvailableFeatures=(null)
   ActiveFeatures=(null)
   Gres=gpu:nvidia-rtx-3090:1
   NodeAddr=yigou-dev-102-68 NodeHostName=yigou-dev-102-68 Version=24.05.0-0rc1
   OS=Linux 5.10.0-153.12.0.92.oe2203sp2.x86_64 #1 SMP Wed Jun 28 23:04:48 CST 2023 
   RealMemory=1 AllocMem=0 FreeMem=340 Sockets=8 Boards=1
   State=IDLE+DRAIN ThreadsPerCore=1 TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A
   Partitions=compute100 
   BootTime=2024-11-18T20:46:45 SlurmdStartTime=2024-12-19T11:41:49
   LastBusyTime=2024-12-19T11:41:49 ResumeAfterTime=None
   CfgTRES=cpu=8,mem=1M,billing=8,gres/gpu=1
   AllocTRES=
   CurrentWatts=0 AveWatts=0
   
   Reason=gres/gpu count reported lower than configured (0 < 1) [slurm@2024-12-19T11:03:34]
"""  # noqa: W291, W293 - as printed
