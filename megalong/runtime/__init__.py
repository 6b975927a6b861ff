"""Ground floor: errors, the device, how ranks are launched, what reaches the console."""
