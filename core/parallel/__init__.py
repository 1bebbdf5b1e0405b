"""Several ranks: how a model's weights and experts are spread over them."""
