"""An engine behind HTTP, as OpenAI's completions and chat completions; it needs what the extra `serve` installs."""
