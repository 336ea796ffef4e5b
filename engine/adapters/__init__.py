"""LoRA and prefix tuning."""
