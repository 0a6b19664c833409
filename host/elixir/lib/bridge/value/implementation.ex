defmodule Bridge.Value.Implementation do
  # The implementation of `Bridge.Encodable` for a struct.
  @moduledoc false

  @spec of(struct()) :: module() | nil
  def of(%module{} = struct), do: Bridge.Encodable.impl_for(struct) || made_later(module)

  # A consolidated protocol knows no implementations that were made after it, as those in a Livebook's cells are.
  defp made_later(module) do
    implementation = Module.concat(Bridge.Encodable, module)
    if Code.ensure_loaded?(implementation), do: implementation
  end
end
