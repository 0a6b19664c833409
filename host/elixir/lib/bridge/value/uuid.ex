defmodule Bridge.UUID do
  @moduledoc """
  Python's `uuid.UUID`, as its text.

      iex> Bridge.UUID.new("12345678-1234-5678-1234-567812345678")
      #Bridge.UUID<12345678-1234-5678-1234-567812345678>
  """

  @enforce_keys [:value]
  defstruct [:value]

  @type t :: %__MODULE__{value: String.t()}

  @doc "The UUID of that text, 8-4-4-4-12 hexadecimal digits; raises `ArgumentError` if it is none."
  @spec new(String.t()) :: t()
  def new(text) when is_binary(text) do
    text = String.downcase(text, :ascii)
    if valid?(text), do: %__MODULE__{value: text}, else: raise(ArgumentError, "not a UUID: #{inspect(text)}")
  end

  @doc false
  @spec valid?(term()) :: boolean()
  def valid?(text), do: is_binary(text) and text =~ ~r/\A[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\z/

  defimpl Inspect do
    def inspect(uuid, _opts), do: "#Bridge.UUID<#{uuid.value}>"
  end

  defimpl String.Chars do
    def to_string(uuid), do: uuid.value
  end
end
