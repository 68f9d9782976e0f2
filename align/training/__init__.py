"""What the SFT, reward and DPO stages share around trl's trainers: rows, arguments, order, progress, checkpoints."""
