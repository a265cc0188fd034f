"""The proxy: speaks the OpenAI API to clients, forwards to the worker, records every call."""
