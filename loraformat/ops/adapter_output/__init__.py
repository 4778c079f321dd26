"""Writing an adapter: into a format of its own, or into a bundle."""
