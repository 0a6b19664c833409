defmodule Bridge.Live.Words do
  @moduledoc false
  # How figures and texts are written where people read them: to the character as the Python host and the kernel do.

  @spinner String.graphemes("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")
  @frame_ns 100_000_000

  # Mixed with the colour of the text, which is dark on a light page and light on a dark one: readable on both.
  @colours for {state, colour} <- [running: "#2979ff", queued: "#2979ff", ok: "#1ea65a", error: "#f0392b"],
               into: %{},
               do: {state, "color-mix(in srgb, #{colour} 60%, currentcolor)"}

  @spec mark(atom(), non_neg_integer()) :: String.t()
  def mark(:ok, _elapsed), do: "✓"
  def mark(:error, _elapsed), do: "✗"
  def mark(_alive, elapsed), do: Enum.at(@spinner, rem(div(elapsed, @frame_ns), length(@spinner)))

  @spec coloured(atom(), String.t()) :: String.t()
  def coloured(state, text), do: ~s(<span style="color:#{@colours[state]}">#{text}</span>)

  @spec framed(String.t()) :: String.t()
  def framed(line) do
    style = "font:12px/1.5 ui-monospace,monospace;padding-left:var(--jp-code-padding,0)"
    ~s(<div class="bridge-line" style="#{style}">#{line}</div>)
  end

  @doc "A duration in nanoseconds as people read it: `412 ms`."
  @spec duration(number()) :: String.t()
  def duration(ns) when ns < 1_000_000, do: fixed(ns / 1000, 0) <> " µs"
  def duration(ns) when ns < 100_000_000, do: fixed(ns / 1.0e6, 1) <> " ms"
  def duration(ns) when ns < 1_000_000_000, do: fixed(ns / 1.0e6, 0) <> " ms"
  def duration(ns) when ns < 120_000_000_000, do: fixed(ns / 1.0e9, 2) <> " s"
  def duration(ns), do: fixed(ns / 60.0e9, 1) <> " min"

  @doc "`1 callback`, `2 callbacks`, `12,000 tokens`."
  @spec quantity(integer(), String.t()) :: String.t()
  def quantity(1, what), do: "1 #{what}"
  def quantity(count, what), do: "#{thousands(count)} #{what}s"

  @spec thousands(integer()) :: String.t()
  def thousands(n) when n < 0, do: "-" <> thousands(-n)
  def thousands(n) when n < 1000, do: Integer.to_string(n)
  def thousands(n), do: thousands(div(n, 1000)) <> "," <> String.pad_leading(Integer.to_string(rem(n, 1000)), 3, "0")

  @doc "So many decimals, of the number as it is in binary, a tie to the even digit: `:erlang.float_to_binary` rounds it up."
  @spec fixed(number(), non_neg_integer()) :: String.t()
  def fixed(number, decimals) do
    {over, under} = ratio(number)
    digits = rounded(abs(over) * Integer.pow(10, decimals), under)
    sign = if over < 0, do: "-", else: ""
    sign <> point(digits, decimals)
  end

  @doc "As Python's `:g`: six significant digits, no zeros at the end."
  @spec general(number()) :: String.t()
  def general(number) do
    case ratio(number) do
      {0, _under} -> "0"
      {over, under} when over < 0 -> "-" <> general(abs(over), under)
      {over, under} -> general(over, under)
    end
  end

  defp general(over, under) do
    {digits, exponent} = significant(over, under, exponent(over, under))

    if exponent < -4 or exponent >= 6 do
      <<first::1-bytes, rest::bytes>> = Integer.to_string(digits)
      rest = String.trim_trailing(rest, "0")
      sign = if exponent < 0, do: "-", else: "+"
      two = exponent |> abs() |> Integer.to_string() |> String.pad_leading(2, "0")
      "#{first}#{if rest != "", do: "." <> rest}e#{sign}#{two}"
    else
      text = point(digits, 5 - exponent)
      if String.contains?(text, "."), do: text |> String.trim_trailing("0") |> String.trim_trailing("."), else: text
    end
  end

  defp significant(over, under, exponent) do
    shift = 5 - exponent
    scaled = if shift >= 0, do: {over * Integer.pow(10, shift), under}, else: {over, under * Integer.pow(10, -shift)}
    digits = rounded(elem(scaled, 0), elem(scaled, 1))
    if digits == 1_000_000, do: {100_000, exponent + 1}, else: {digits, exponent}
  end

  # The power of ten that the number begins with.
  defp exponent(over, under) do
    guess = length(Integer.digits(over)) - length(Integer.digits(under))
    scaled? = fn e -> if e >= 0, do: over >= under * Integer.pow(10, e), else: over * Integer.pow(10, -e) >= under end
    Enum.find([guess + 1, guess, guess - 1], guess - 1, scaled?)
  end

  defp ratio(number) when is_integer(number), do: Float.ratio(number * 1.0)
  defp ratio(number), do: Float.ratio(number)

  defp rounded(over, under) do
    {whole, rest} = {div(over, under), rem(over, under)}

    cond do
      2 * rest > under or (2 * rest == under and rem(whole, 2) == 1) -> whole + 1
      true -> whole
    end
  end

  defp point(digits, 0), do: Integer.to_string(digits)

  defp point(digits, decimals) do
    text = digits |> Integer.to_string() |> String.pad_leading(decimals + 1, "0")
    {whole, rest} = String.split_at(text, -decimals)
    whole <> "." <> rest
  end

  @doc "On one line, without what would move a cursor, and no longer than so many characters."
  @spec clip(String.t(), pos_integer()) :: String.t()
  def clip(text, most) do
    text =
      if printable?(text),
        do: text,
        else: text |> head(4 * most) |> in_one_line() |> String.split(" ", trim: true) |> Enum.join(" ")

    # In code points, as Python counts; a byte is never more than one of them.
    if byte_size(text) <= most or length(String.codepoints(text)) <= most, do: text, else: head(text, most - 1) <> "…"
  end

  @doc "Each character that would break a line, or steer whatever shows it, is a space."
  @spec in_one_line(String.t()) :: String.t()
  def in_one_line(text), do: if(printable?(text), do: text, else: Regex.replace(unprintable(), text, " "))

  defp printable?(text), do: not Regex.match?(unprintable(), text)

  # As Python's `str.isprintable` has it: Other and Separator, but for a plain space; and but for what is not assigned,
  # for the tables here are older than today's emoji. Not an attribute: since OTP 28 a compiled pattern cannot be kept in
  # one.
  defp unprintable, do: ~r/[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u

  defp head(text, most), do: text |> String.codepoints() |> Enum.take(most) |> Enum.join()

  @doc "As Python's `html.escape`."
  @spec escape(String.t()) :: String.t()
  def escape(text) do
    String.replace(text, ["&", "<", ">", "\"", "'"], fn
      "&" -> "&amp;"
      "<" -> "&lt;"
      ">" -> "&gt;"
      "\"" -> "&quot;"
      "'" -> "&#x27;"
    end)
  end
end
