"""Loss against compute."""
