"""Options of the Python tests.

pytest test/python                             ranks are processes on the CPU
pytest test/python --platform cuda             one process per GPU
pytest test/python --platform cuda --threads   ranks are threads, which may share a GPU
"""

import os


def pytest_addoption(parser):
    parser.addoption(
        "--platform", choices=("cpu", "cuda"), default="cpu", help="where tensors live"
    )
    parser.addoption("--threads", action="store_true", help="ranks are threads, not processes")


def pytest_configure(config):
    if config.getoption("--threads"):  # each rank has streams of its own, on one GPU
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        os.environ.setdefault("CUDA_DEVICE_MAX_COPY_CONNECTIONS", "32")
