"""jaxserve: a production LLM serving engine in JAX."""
