"""The desk check: every CUDA path of the package on a machine without a GPU.

A CUDA device is emulated (`emulated.py`, `device.py`), each path is run beside its CPU twin, and
kernel launches and waits of the host for the device are counted against stated budgets.

It finds: CPU and CUDA tensors in one operation, host memory asked of a device tensor, waits for
the device with file and line, kernel launches, results that differ from the CPU's, kernels that
read or write wrong cells (Triton interprets them), and keyword arguments and devices that only
the CUDA path has.

It cannot find: races between streams or inside a kernel (one thing runs after the other here),
what NCCL does or refuses, what Triton's compiler or a real driver refuses, memory that runs out,
float atomics whose order changes, and time.

`python -m pytest` runs it through tests/unit/test_desk.py. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/desk
"""
