"""The worker: vLLM's OpenAI server with nnsight observers that record what the model computes."""
