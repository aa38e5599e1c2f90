"""Tables, texts and figures of finished runs."""
