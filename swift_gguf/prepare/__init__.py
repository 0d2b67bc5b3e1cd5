"""Makes a model's sidecar from the model itself: `swift-gguf prepare`."""
