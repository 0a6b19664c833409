"""The version of Bridge: one number for the kernel, the hosts and the wheel."""

__version__ = "0.1.0"
