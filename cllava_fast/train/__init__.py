"""The continual-tuning loop and its stages."""
