defmodule Bridge.NDArray do
  @moduledoc """
  An array of NumPy that `{type, shape, binary}` cannot say: big-endian, in Fortran order, or of booleans, text,
  moments, structs.

  `dtype` is as in NumPy's file format, `"|b1"` or a list of fields; `order` is `"C"` or `"F"`. Plain arrays arrive as
  `{{:f, 32}, {2, 3}, binary}`: little-endian, in C order; the types are `:s`, `:u`, `:f` and `:c` with their bits.

      iex> %Bridge.NDArray{dtype: "|b1", shape: {2}, data: <<1, 0>>}
      #Bridge.NDArray<|b1 [2], 2 bytes>
  """

  @enforce_keys [:dtype, :shape, :data]
  defstruct [:dtype, :shape, :data, order: "C"]

  @type t :: %__MODULE__{dtype: String.t() | list(), shape: tuple(), data: binary(), order: String.t()}

  defimpl Inspect do
    def inspect(%{dtype: dtype, shape: shape, data: data, order: order}, _opts)
        when is_tuple(shape) and is_binary(data) do
      named = if is_binary(dtype), do: dtype, else: Kernel.inspect(dtype, limit: 8, printable_limit: 60)
      shape = Kernel.inspect(Tuple.to_list(shape), charlists: :as_lists)
      "#Bridge.NDArray<#{named} #{shape}#{if order == "F", do: " F"}, #{Bridge.Bytes.size_text(byte_size(data))}>"
    end

    def inspect(array, opts), do: Inspect.Any.inspect(array, opts)
  end
end

defmodule Bridge.NpScalar do
  @moduledoc """
  A scalar of NumPy: `numpy.float32(1.5)`, `numpy.datetime64("2024-01-02")`. Goes back to Python as what it was.

  `dtype` is as in NumPy's file format, or `"str"` or `"bytes"`; `data` is the item's bytes, or the text.

      iex> scalar = %Bridge.NpScalar{dtype: "<f4", data: <<1.5::float-32-little>>}
      #Bridge.NpScalar<<f4 1.5>
      iex> Bridge.NpScalar.value(scalar)
      {:ok, 1.5}
  """

  @enforce_keys [:dtype, :data]
  defstruct [:dtype, :data]

  @type t :: %__MODULE__{dtype: String.t() | list(), data: binary()}

  @doc "Its value, if Elixir has such: a number, `:nan`, `:infinity`, `:neg_infinity`, a boolean, a string."
  @spec value(t()) :: {:ok, number() | atom() | String.t()} | :error
  def value(%__MODULE__{dtype: "str", data: text}), do: {:ok, text}
  def value(%__MODULE__{dtype: "|b1", data: <<byte>>}), do: {:ok, byte != 0}

  def value(%__MODULE__{dtype: <<order, kind, _size::binary>>, data: data})
      when order in [?<, ?>, ?|] and kind in [?i, ?u, ?f] do
    number(kind, if(order == ?>, do: reversed(data), else: data))
  end

  def value(%__MODULE__{}), do: :error

  defp reversed(data), do: data |> :binary.decode_unsigned(:little) |> encode_unsigned(byte_size(data))
  defp encode_unsigned(number, size), do: <<number::unsigned-big-unit(8)-size(size)>>

  defp number(?i, data), do: {:ok, signed(data, bit_size(data))}
  defp number(?u, data), do: {:ok, :binary.decode_unsigned(data, :little)}
  defp number(?f, data) when byte_size(data) in [2, 4, 8], do: {:ok, float(data, bit_size(data))}
  defp number(_kind, _data), do: :error

  defp signed(data, bits) do
    <<number::signed-little-size(bits)>> = data
    number
  end

  defp float(data, bits) do
    case data do
      <<number::float-little-size(bits)>> -> number
      _ -> not_finite(:binary.decode_unsigned(data, :little), bits)
    end
  end

  @fraction_bits %{16 => 10, 32 => 23, 64 => 52}

  defp not_finite(number, bits) do
    fraction = Bitwise.band(number, Bitwise.bsl(1, @fraction_bits[bits]) - 1)

    cond do
      fraction != 0 -> :nan
      Bitwise.bsr(number, bits - 1) == 1 -> :neg_infinity
      true -> :infinity
    end
  end

  defimpl Inspect do
    def inspect(%{data: data} = scalar, _opts) when is_binary(data) do
      shown =
        case Bridge.NpScalar.value(scalar) do
          {:ok, value} -> Kernel.inspect(value)
          :error -> Kernel.inspect(data, limit: 16, binaries: :as_binaries)
        end

      named = if is_binary(scalar.dtype), do: scalar.dtype, else: Kernel.inspect(scalar.dtype, limit: 8)
      "#Bridge.NpScalar<#{named} #{shown}>"
    end

    def inspect(scalar, opts), do: Inspect.Any.inspect(scalar, opts)
  end
end
