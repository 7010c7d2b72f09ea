"""MSCCL++: communication for GPUs and CPUs. The extensions are in :mod:`mscclpp.ext`."""
