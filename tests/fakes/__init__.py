"""A machine without a GPU that keeps the rules of one: fakes of CUDA and TensorRT."""
