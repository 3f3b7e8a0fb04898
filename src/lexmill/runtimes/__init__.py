"""Where models run: transformers, llama.cpp and Ollama, and the proof that they give the same answers."""
