"""A model as files for other programs: OpenCLIP, safetensors and ONNX, each with a model card."""
