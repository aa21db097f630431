"""What a run does beside training: its folder, pictures, progress line and guard against nan."""
