"""The OpenAI API over HTTP, and the page that speaks it."""
