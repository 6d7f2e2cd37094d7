"""gpt watch: what the files of runs tell while they train, and the page that shows it."""
