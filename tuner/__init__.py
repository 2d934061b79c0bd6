"""What to run: scenarios, studies, what-if, and validation on a real run."""
