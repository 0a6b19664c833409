defmodule Bridge.Value do
  @moduledoc """
  Values and their wire form: a term to JSON with binary buffers, and back.

  What goes to Python and comes back is the same term, or is refused with an error that names the path inside the value.
  Nothing on the wire becomes an atom, and no code runs because a peer names it.

  | Elixir | Python |
  | --- | --- |
  | `nil`, `true`, `false`, integers of any size, floats | the same |
  | `:nan`, `:infinity`, `:neg_infinity` | the floats |
  | a string (UTF-8) | `str` |
  | `Bridge.Bytes` | `bytes`, `bytearray` |
  | a list, a tuple | `list`, `tuple` |
  | a map | `dict` |
  | `MapSet`, `Bridge.Frozenset` | `set`, `frozenset` |
  | `Date`, `Time`, `NaiveDateTime` | `date`, `time`, `datetime` without a zone |
  | `DateTime` | `datetime` in UTC, or in a zone that the time zone database knows |
  | `Bridge.Zoned`, `Bridge.Timedelta`, `Bridge.UUID`, `Bridge.Complex` | the rest of these |
  | `Decimal` when loaded, else `Bridge.Decimal` | `decimal.Decimal` |
  | `{{:f, 32}, {2, 3}, binary}`; tensors of Nx; `Bridge.NDArray`, `Bridge.NpScalar` | arrays and scalars of NumPy |
  | `Bridge.Table` | tables of pyarrow, polars, pandas |
  | `Bridge.Record` | dataclasses, pydantic models, named tuples, enumerations, registered classes |
  | `Bridge.Ref`, `Bridge.Tool`, `Bridge.Variable` | what the session owns |
  | other structs | what `Bridge.Encodable` makes of them |

  One thing is converted: **keys that are atoms become strings**, so that `%{question: "…"}` is a dict with the key
  `"question"`. (Not `nil`, `true`, `false` and the three floats, which are values as keys too.) One thing is not kept: the
  order of a dict. A map has none, and its pairs are written in order of their keys. To Python `1`, `1.0` and `True` are
  one key.
  """

  alias Bridge.Error
  alias Bridge.Value.{Decoder, Encoder, Fault}

  @doc """
  The wire form of a term: JSON, and the buffers that its numbers point to.

  `path` begins the path in an error. `first:` is the number of the first buffer, 0 unless given.

      iex> Bridge.Value.encode(%{rows: [1, 2.5, {nil, "a"}]})
      {:ok, %{"rows" => [1, 2.5, %{"$bridge" => "tuple", "items" => [nil, "a"]}]}, []}
      iex> {:error, error} = Bridge.Value.encode(%{"rows" => [self()]})
      iex> {error.name, error.message}
      {:not_serializable, ~S(value["rows"][0]: a pid cannot cross the bridge)}
  """
  @spec encode(term(), String.t(), keyword()) :: {:ok, term(), [binary()]} | {:error, Error.t()}
  def encode(term, path \\ "value", opts \\ []) do
    with {:ok, [json], buffers} <- encode_many([{path, term}], opts), do: {:ok, json, buffers}
  end

  @doc """
  The wire forms of several terms of one message, each with the path that begins its errors; they share the buffers.

      iex> Bridge.Value.encode_many([{"args[0]", 1}, {"name", "x"}])
      {:ok, [1, "x"], []}
  """
  @spec encode_many([{String.t(), term()}], keyword()) :: {:ok, [term()], [binary()]} | {:error, Error.t()}
  def encode_many(terms, opts \\ []) do
    encode_each(terms, Encoder.new(Keyword.get(opts, :first, 0)), [])
  end

  defp encode_each([{path, term} | rest], encoder, done) do
    case Fault.catching(path, fn -> Encoder.encode(term, encoder) end) do
      {:error, %Error{}} = error -> error
      {json, encoder} -> encode_each(rest, encoder, [json | done])
    end
  end

  defp encode_each([], encoder, done), do: {:ok, Enum.reverse(done), Encoder.buffers(encoder)}

  @doc """
  The term of a wire form.

  Options: `path:` begins the path in an error (`"value"`). `hook:` is called with each `Bridge.Ref`, `Bridge.Tool` and
  `Bridge.Variable`, and gives what takes its place. `nx: true` makes tensors of Nx of plain arrays.

      iex> Bridge.Value.decode(%{"$bridge" => "tuple", "items" => [1, %{"$bridge" => "float", "value" => "nan"}]}, [])
      {:ok, {1, :nan}}
      iex> {:error, error} = Bridge.Value.decode([%{"$bridge" => "int", "hex" => "0x1f"}], [], path: "result")
      iex> {error.name, String.slice(error.message, 0, 11)}
      {:malformed_value, "result[0]: "}
  """
  @spec decode(term(), [binary()], keyword()) :: {:ok, term()} | {:error, Error.t()}
  def decode(json, buffers, opts \\ []) do
    with {:ok, [term]} <- decode_many([{Keyword.get(opts, :path, "value"), json}], buffers, opts), do: {:ok, term}
  end

  @doc """
  The terms of several wire forms of one message, each with the path that begins its errors. Each buffer belongs to
  exactly one of them.

      iex> Bridge.Value.decode_many([{"args[0]", 1}, {"name", "x"}], [])
      {:ok, [1, "x"]}
  """
  @spec decode_many([{String.t(), term()}], [binary()], keyword()) :: {:ok, [term()]} | {:error, Error.t()}
  def decode_many(trees, buffers, opts \\ []), do: decode_each(trees, Decoder.new(buffers, opts), [], trees)

  defp decode_each([{path, json} | rest], decoder, done, all) do
    case Fault.catching(path, fn -> Decoder.decode(json, decoder) end) do
      {:error, %Error{}} = error -> error
      {term, decoder} -> decode_each(rest, decoder, [term | done], all)
    end
  end

  defp decode_each([], decoder, done, all) do
    root = with [{path, _} | _] <- all, do: path, else: (_ -> "values")

    case Fault.catching(root, fn -> Decoder.finish(decoder) end) do
      :ok -> {:ok, Enum.reverse(done)}
      error -> error
    end
  end
end
