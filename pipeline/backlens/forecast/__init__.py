"""What a run will take, before it runs: `backlens plan`."""
