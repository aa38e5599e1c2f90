"""What a run is: fields, presets and the command line."""
