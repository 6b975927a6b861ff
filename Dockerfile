# NVIDIA's PyTorch image brings torch, Transformer Engine, apex and DALI that fit one another and the driver. What we
# add lies in a virtual environment on top that sees the image's packages; constraints made from the image keep pip
# from shadowing them. 26.07 holds torch 2.13.0a0; 26.03 and older are pre-releases of 2.11, which torch>=2.11 refuses.
#   docker build -t megalong . && docker run --rm --gpus all --ipc=host megalong make test
ARG BASE=nvcr.io/nvidia/pytorch:26.07-py3
FROM ${BASE}

# no uid given: 1000 belongs to the image's own user "ubuntu"
RUN useradd --create-home --shell /bin/bash megalong && install -d -o megalong -g megalong /opt/megalong
USER megalong
WORKDIR /opt/megalong

# first what decides the environment, so that a change of the code does not build it again
COPY --chown=megalong:megalong pyproject.toml README.md ./
COPY --chown=megalong:megalong megalong/__init__.py megalong/
# PIP_CONSTRAINT takes the place of the image's own, which pins every package it was built with
RUN python -m venv --system-site-packages --without-pip .venv \
 && python -m pip list --format=freeze \
      | grep -iE '^(torch|torchvision|torchaudio|(pytorch-)?triton|transformer[-_]engine.*|apex|flash[-_]attn|numpy|nvidia-.*)==' \
      > .venv/image-constraints.txt \
 && PIP_CONSTRAINT=.venv/image-constraints.txt .venv/bin/python -m pip install --no-cache-dir -e '.[dev]' \
 && .venv/bin/python -c "import importlib.util as u; p = u.find_spec('torch').origin; assert '.venv' not in p, p"
ENV PATH=/opt/megalong/.venv/bin:${PATH}

COPY --chown=megalong:megalong . .
# the environment counts as made from constraints.txt, so `make test` and `make lint` use it as it is
RUN touch .venv/.ready
CMD ["python", "megalong/pretrain.py", "--help"]
