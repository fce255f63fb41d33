"""From a bundle's ONNX graphs to TensorRT plans."""
