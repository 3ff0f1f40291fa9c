"""``python -m largebatch`` and ``torchrun -m largebatch``."""

from largebatch.cli import program

if __name__ == "__main__":
    program()
