defmodule Bridge.Bytes do
  @moduledoc """
  Python's `bytes`, or with `mutable: true` its `bytearray`.

  An Elixir binary is text on the wire, and must be UTF-8. Wrap what is not text:

      iex> Bridge.Bytes.new(<<0, 255>>)
      Bridge.Bytes.new(<<0, 255>>)
      iex> Bridge.Bytes.new(<<0, 255>>).data
      <<0, 255>>
  """

  @enforce_keys [:data]
  defstruct [:data, mutable: false]

  @type t :: %__MODULE__{data: binary(), mutable: boolean()}

  @doc "Wraps a binary; `mutable: true` makes it a `bytearray`."
  @spec new(binary(), keyword()) :: t()
  def new(data, opts \\ []) when is_binary(data),
    do: %__MODULE__{data: data, mutable: Keyword.get(opts, :mutable, false)}

  @doc """
  A count of bytes for people.

      iex> Bridge.Bytes.size_text(1536)
      "1.5 KiB"
  """
  @spec size_text(non_neg_integer()) :: String.t()
  def size_text(1), do: "1 byte"
  def size_text(count) when count < 1024, do: "#{count} bytes"
  def size_text(count), do: size_text(count / 1024, ["KiB", "MiB", "GiB"])

  defp size_text(count, [_unit, next | rest]) when count >= 1024, do: size_text(count / 1024, [next | rest])
  defp size_text(count, [unit | _]), do: :erlang.float_to_binary(count, decimals: 1) <> " " <> unit

  defimpl Inspect do
    @shown 24

    def inspect(%{data: data, mutable: mutable}, opts) when is_binary(data) and byte_size(data) <= @shown do
      shown = Kernel.inspect(data, limit: opts.limit, base: opts.base, binaries: :as_binaries)
      "Bridge.Bytes.new(#{shown}#{if mutable, do: ", mutable: true"})"
    end

    def inspect(%{data: data, mutable: mutable}, _opts) when is_binary(data) do
      kind = if mutable, do: "Bridge.Bytes mutable", else: "Bridge.Bytes"
      head = data |> binary_part(0, @shown) |> Kernel.inspect(limit: @shown, binaries: :as_binaries)
      "##{kind}<#{Bridge.Bytes.size_text(byte_size(data))}: #{String.trim_trailing(head, ">>")}, …>>>"
    end

    def inspect(bytes, opts), do: Inspect.Any.inspect(bytes, opts)
  end
end
