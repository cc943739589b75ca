"""What a stored feature is: the recipe, weights, the forward pass, precisions and the budgeted codec."""
