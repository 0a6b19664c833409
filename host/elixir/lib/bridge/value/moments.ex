defmodule Bridge.Timedelta do
  @moduledoc """
  Python's `datetime.timedelta`, normalized as there: only `days` is ever negative.

      iex> Bridge.Timedelta.from_microseconds(-1)
      #Bridge.Timedelta<-1 day, 23:59:59.999999>
      iex> Bridge.Timedelta.to_microseconds(%Bridge.Timedelta{seconds: 90})
      90_000_000
  """

  defstruct days: 0, seconds: 0, microseconds: 0

  @type t :: %__MODULE__{days: integer(), seconds: 0..86_399, microseconds: 0..999_999}

  @day 86_400_000_000

  @doc "The duration of so many microseconds."
  @spec from_microseconds(integer()) :: t()
  def from_microseconds(count) when is_integer(count) do
    rest = Integer.mod(count, @day)
    %__MODULE__{days: Integer.floor_div(count, @day), seconds: div(rest, 1_000_000), microseconds: rem(rest, 1_000_000)}
  end

  @doc "How many microseconds it is."
  @spec to_microseconds(t()) :: integer()
  def to_microseconds(%__MODULE__{} = delta), do: delta.days * @day + delta.seconds * 1_000_000 + delta.microseconds

  defimpl Inspect do
    def inspect(%{days: days, seconds: seconds, microseconds: micros} = delta, _opts)
        when is_integer(days) and seconds in 0..86_399 and micros in 0..999_999 do
      clock = Time.to_iso8601(Time.add(~T[00:00:00], seconds))
      fraction = if micros == 0, do: "", else: "." <> String.pad_leading("#{micros}", 6, "0")
      unit = if abs(days) == 1, do: "day", else: "days"
      "#Bridge.Timedelta<#{if delta.days != 0, do: "#{days} #{unit}, "}#{clock}#{fraction}>"
    end

    def inspect(delta, opts), do: Inspect.Any.inspect(delta, opts)
  end
end

defmodule Bridge.Zoned do
  @moduledoc """
  A moment of Python's that `DateTime` and `Time` cannot hold: a time with an offset, a moment at a fixed offset or in a
  named zone of which nothing is known here, or one with a `fold`.

  `value` is the wall clock's `NaiveDateTime` or `Time`. Then either `zone`, or `offset_us` (microseconds east of UTC)
  with an optional `name`, or none of them. `fold` 1 is the second time that a clock that was set back showed it.

      iex> %Bridge.Zoned{value: ~N[2024-10-27 02:30:00], zone: "Europe/Berlin", fold: 1}
      #Bridge.Zoned<2024-10-27T02:30:00 Europe/Berlin, fold 1>
  """

  @enforce_keys [:value]
  defstruct [:value, :zone, :offset_us, :name, fold: 0]

  @type t :: %__MODULE__{
          value: NaiveDateTime.t() | Time.t(),
          zone: String.t() | nil,
          offset_us: integer() | nil,
          name: String.t() | nil,
          fold: 0 | 1
        }

  @doc """
  The moment in UTC, if it says its offset.

      iex> Bridge.Zoned.to_utc(%Bridge.Zoned{value: ~N[2024-01-02 02:00:00], offset_us: 3_600_000_000})
      {:ok, ~U[2024-01-02 01:00:00Z]}
      iex> Bridge.Zoned.to_utc(%Bridge.Zoned{value: ~N[2024-01-02 02:00:00], zone: "Europe/Berlin"})
      :error
  """
  @spec to_utc(t()) :: {:ok, DateTime.t()} | :error
  def to_utc(%__MODULE__{value: %NaiveDateTime{} = wall, offset_us: offset}) when is_integer(offset) do
    {unit, count} = if rem(offset, 1_000_000) == 0, do: {:second, div(offset, 1_000_000)}, else: {:microsecond, offset}
    {:ok, wall |> NaiveDateTime.add(-count, unit) |> DateTime.from_naive!("Etc/UTC")}
  end

  def to_utc(%__MODULE__{}), do: :error

  defimpl Inspect do
    def inspect(%{value: %module{} = value} = zoned, _opts) when module in [NaiveDateTime, Time] do
      fold = if zoned.fold == 1, do: ", fold 1", else: ""
      "#Bridge.Zoned<#{module.to_iso8601(value)}#{place(zoned)}#{fold}>"
    end

    def inspect(zoned, opts), do: Inspect.Any.inspect(zoned, opts)

    defp place(%{zone: zone}) when is_binary(zone), do: " " <> zone
    defp place(%{offset_us: nil}), do: ""

    defp place(%{offset_us: offset, name: name}) do
      seconds = div(abs(offset), 1_000_000)
      minutes = seconds |> div(60) |> rem(60) |> Integer.to_string() |> String.pad_leading(2, "0")
      hours = seconds |> div(3600) |> Integer.to_string() |> String.pad_leading(2, "0")
      rest = if rem(abs(offset), 60_000_000) == 0, do: "", else: " (#{offset} µs)"
      " #{if offset < 0, do: "-", else: "+"}#{hours}:#{minutes}#{rest}#{if name, do: " #{name}"}"
    end
  end
end
