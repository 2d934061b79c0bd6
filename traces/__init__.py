"""What was recorded: routing traces of real models, their statistics and how tokens form steps."""
