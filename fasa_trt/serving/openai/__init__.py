"""OpenAI's HTTP protocol: completions, chat, streaming."""
