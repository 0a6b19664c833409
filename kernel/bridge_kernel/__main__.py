"""`python -m bridge_kernel -f connection.json`: what the kernelspec runs."""

from .app import BridgeKernelApp

if __name__ == "__main__":
    BridgeKernelApp.launch_instance()
