"""Shows what a person sees: lines, progress, escaped text, figures."""
