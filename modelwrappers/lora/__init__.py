"""What methods are made of; knows no method and no loop."""
