"""An evaluation command: asks the benchmark that started it for the loss of a checkpoint, over a socket. No heavy imports.

python -S ask.py SOCKET CKPT
"""

import socket
import sys

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    connection.sendall(sys.argv[2].encode() + b"\n")
    print(connection.makefile().readline().strip())
