"""Forecast of a run before it runs (`backlens plan`): rows, bytes, operations, devices, time and cost."""
