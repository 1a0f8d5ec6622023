"""A model as files for other programs: OpenCLIP, Transformers, safetensors and ONNX, each with a model card."""
