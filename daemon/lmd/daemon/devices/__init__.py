"""What models can be loaded on, and how much memory is free there.

The daemon never loads the engine: it asks it in a process of its own (`engine_probe`), reads the drivers (`nvidia`,
`drm`) and the kernel (`cpu`), and puts the answers together (`matching`, `inventory`).
"""

from lmd.daemon.devices.cpu import main_memory
from lmd.daemon.devices.inventory import Inventory
from lmd.daemon.devices.values import CPU, Device

__all__ = ["CPU", "Device", "Inventory", "main_memory"]
