"""An OpenAI-compatible server over one model: `swift-gguf serve`."""
