"""Tables and plots of the records."""
