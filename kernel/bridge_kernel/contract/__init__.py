"""What both sides of the bridge share: frames, messages, values, errors and the OpenRPC document.

Pure: bytes and values. Nothing here opens a socket, starts a thread, reads a clock or the environment.
"""
