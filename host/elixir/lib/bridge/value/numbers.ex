defmodule Bridge.Complex do
  @moduledoc """
  Python's `complex`. The parts are floats, or `:nan`, `:infinity`, `:neg_infinity`.

      iex> %Bridge.Complex{real: 1.5, imag: -2.0}
      #Bridge.Complex<1.5-2.0i>
  """

  @enforce_keys [:real, :imag]
  defstruct [:real, :imag]

  @type part :: float() | :nan | :infinity | :neg_infinity
  @type t :: %__MODULE__{real: part(), imag: part()}

  defimpl Inspect do
    def inspect(%{real: real, imag: imag}, _opts) do
      imag = part(imag)
      sign = if String.starts_with?(imag, "-"), do: "", else: "+"
      "#Bridge.Complex<#{part(real)}#{sign}#{imag}i>"
    end

    defp part(:infinity), do: "inf"
    defp part(:neg_infinity), do: "-inf"
    defp part(part), do: to_string(part)
  end
end

defmodule Bridge.Decimal do
  @moduledoc """
  Python's `decimal.Decimal`, as text: where the package `Decimal` is not loaded, or cannot hold it (`sNaN12`).

  Where `Decimal` is loaded, values arrive as its structs, and its structs are taken as arguments.

      iex> Bridge.Decimal.new("-1.10")
      #Bridge.Decimal<-1.10>
  """

  @enforce_keys [:value]
  defstruct [:value]

  @type t :: %__MODULE__{value: String.t()}

  @max_digits 18

  @doc "A decimal of that text, as Python writes it; raises `ArgumentError` if it is none."
  @spec new(String.t()) :: t()
  def new(text) do
    if valid?(text), do: %__MODULE__{value: text}, else: raise(ArgumentError, "not a decimal: #{inspect(text)}")
  end

  @doc false
  @spec valid?(term()) :: boolean()
  def valid?(text) do
    # As Python's `str` writes one.
    is_binary(text) and text =~ ~r/\A-?(?:[0-9]+(?:\.[0-9]+)?(?:E[+-][0-9]+)?|Infinity|s?NaN[0-9]*)\z/ and
      exponent_in_range?(text)
  end

  # Python's decimals have exponents of at most 18 digits.
  defp exponent_in_range?(text) do
    case String.split(text, "E") do
      [_, <<_sign, digits::binary>>] -> digits |> String.trim_leading("0") |> byte_size() <= @max_digits
      [_] -> true
    end
  end

  @doc false
  # The package's struct, if it can hold the text.
  @spec to_package(t()) :: struct() | t()
  def to_package(%__MODULE__{value: text} = ours) do
    {sign, rest} =
      if String.starts_with?(text, "-"), do: {-1, binary_part(text, 1, byte_size(text) - 1)}, else: {1, text}

    case rest do
      "Infinity" -> package(sign, :inf, 0)
      "NaN" when sign == 1 -> package(1, :NaN, 0)
      <<digit, _::binary>> when digit in ?0..?9 -> finite(sign, rest)
      _ -> ours
    end
  end

  defp finite(sign, text) do
    {mantissa, exponent} =
      case String.split(text, "E") do
        [mantissa, exponent] -> {mantissa, String.to_integer(exponent)}
        [mantissa] -> {mantissa, 0}
      end

    case String.split(mantissa, ".") do
      [whole] -> package(sign, String.to_integer(whole), exponent)
      [whole, part] -> package(sign, String.to_integer(whole <> part), exponent - byte_size(part))
    end
  end

  defp package(sign, coef, exp), do: %{__struct__: Decimal, sign: sign, coef: coef, exp: exp}

  @doc false
  # What Python's `str` would make of the package's struct: the specification's scientific string.
  @spec of_package(map()) :: t()
  def of_package(%{sign: sign, coef: coef, exp: exp}) do
    %__MODULE__{value: if(sign < 0, do: "-", else: "") <> unsigned(coef, exp)}
  end

  defp unsigned(:NaN, _exp), do: "NaN"
  defp unsigned(:inf, _exp), do: "Infinity"

  defp unsigned(coef, exp) do
    digits = Integer.to_string(coef)
    adjusted = exp + byte_size(digits) - 1

    cond do
      exp == 0 -> digits
      exp < 0 and adjusted >= 0 -> point(digits, byte_size(digits) + exp)
      exp < 0 and adjusted >= -6 -> "0." <> String.duplicate("0", -adjusted - 1) <> digits
      true -> scientific(digits, adjusted)
    end
  end

  defp scientific(<<_digit>> = digits, adjusted), do: digits <> exponent(adjusted)
  defp scientific(digits, adjusted), do: point(digits, 1) <> exponent(adjusted)

  defp point(digits, at), do: binary_part(digits, 0, at) <> "." <> binary_part(digits, at, byte_size(digits) - at)

  defp exponent(number) when number < 0, do: "E#{number}"
  defp exponent(number), do: "E+#{number}"

  defimpl Inspect do
    def inspect(decimal, _opts), do: "#Bridge.Decimal<#{decimal.value}>"
  end

  defimpl String.Chars do
    def to_string(decimal), do: decimal.value
  end
end
