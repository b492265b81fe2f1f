"""`python -m onnx_eptq` is the command `onnx-eptq`."""

from onnx_eptq.cli import main

if __name__ == "__main__":
    main()
