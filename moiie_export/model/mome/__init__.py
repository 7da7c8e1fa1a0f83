"""The MoME reference: three vision experts, the instance router, adapters beside the decoder's networks."""
