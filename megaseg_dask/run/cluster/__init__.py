"""Workers of a run: started as the settings say, made ready, watched, and given back."""
