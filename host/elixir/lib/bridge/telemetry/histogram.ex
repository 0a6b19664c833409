defmodule Bridge.Telemetry.Histogram do
  @moduledoc false
  # How durations are distributed: counts on a logarithmic scale, in one `:atomics` array that any process adds to.
  # Each power of two is cut into 16 equal parts, as HdrHistogram has it: a percentile is off by 3.2 % at most. Less than
  # a microsecond counts as that, more than 39 hours as those. `total`, `low` and `high` are exact.

  import Bitwise

  @least 1 <<< 10
  @most (1 <<< 47) - 1
  @first 112
  @buckets 592
  @total 1
  @low 2
  @high 3
  @head 3
  @unset 0x7FFFFFFFFFFFFFFF

  @opaque t :: :atomics.atomics_ref()
  @type counts :: [{non_neg_integer(), pos_integer()}]

  @doc "One that has counted nothing."
  @spec new() :: t()
  def new do
    ref = :atomics.new(@head + @buckets, signed: true)
    :atomics.put(ref, @low, @unset)
    ref
  end

  @doc "Count one duration, in nanoseconds; the bucket that it fell into."
  @spec add(t(), integer()) :: non_neg_integer()
  def add(ref, ns) do
    bucket = bucket(ns)
    :atomics.add(ref, @head + 1 + bucket, 1)
    :atomics.add(ref, @total, ns)
    if ns < :atomics.get(ref, @low), do: least(ref, ns, :atomics.get(ref, @low))
    if ns > :atomics.get(ref, @high), do: greatest(ref, ns, :atomics.get(ref, @high))
    bucket
  end

  @doc "Count into a bucket that `add/2` has found."
  @spec add_to(t(), non_neg_integer()) :: :ok
  def add_to(ref, bucket), do: :atomics.add(ref, @head + 1 + bucket, 1)

  @doc "Forget all counts. What is added meanwhile may be forgotten too."
  @spec reset(t()) :: :ok
  def reset(ref) do
    Enum.each(1..(@head + @buckets), &:atomics.put(ref, &1, 0))
    :atomics.put(ref, @low, @unset)
  end

  defp least(ref, ns, known) when ns < known do
    case :atomics.compare_exchange(ref, @low, known, ns) do
      :ok -> :ok
      other -> least(ref, ns, other)
    end
  end

  defp least(_ref, _ns, _known), do: :ok

  defp greatest(ref, ns, known) when ns > known do
    case :atomics.compare_exchange(ref, @high, known, ns) do
      :ok -> :ok
      other -> greatest(ref, ns, other)
    end
  end

  defp greatest(_ref, _ns, _known), do: :ok

  @doc "The bucket of a duration."
  @spec bucket(integer()) :: non_neg_integer()
  def bucket(ns) when ns <= @least, do: 0
  def bucket(ns) when ns >= @most, do: @buckets - 1

  def bucket(ns) do
    # The exponent of a float is the number of bits, and below 2^53 it is exact.
    <<_sign::1, exponent::11, _::52>> = <<ns::float>>
    shift = exponent - 1023 - 4
    (shift <<< 4) + (ns >>> shift) - @first
  end

  @doc "The counts of the buckets that were hit, in order."
  @spec counts(t()) :: counts()
  def counts(ref) do
    for bucket <- 0..(@buckets - 1), (count = :atomics.get(ref, @head + 1 + bucket)) > 0, do: {bucket, count}
  end

  @doc "How many were counted, their sum, least and greatest, and these percentiles; nil where there are none."
  @spec figures(t(), [float()]) :: %{
          count: non_neg_integer(),
          total: integer(),
          low: integer() | nil,
          high: integer() | nil,
          percentiles: [integer() | nil]
        }
  def figures(ref, shares) do
    counts = counts(ref)

    if counts == [] do
      %{count: 0, total: 0, low: nil, high: nil, percentiles: Enum.map(shares, fn _ -> nil end)}
    else
      # Read after the counts: a value is added before it widens these.
      {low, high} = {:atomics.get(ref, @low), :atomics.get(ref, @high)}
      percentiles = for found <- percentiles(counts, shares), do: found |> max(min(low, high)) |> min(high)
      count = Enum.reduce(counts, 0, fn {_bucket, n}, sum -> sum + n end)
      %{count: count, total: :atomics.get(ref, @total), low: low, high: high, percentiles: percentiles}
    end
  end

  @doc "The percentiles of counts: for each share the middle of its bucket; nil where there are none."
  @spec percentiles(counts(), [float()]) :: [integer() | nil]
  def percentiles([], shares), do: Enum.map(shares, fn _ -> nil end)

  def percentiles(counts, shares) do
    count = Enum.reduce(counts, 0, fn {_bucket, n}, sum -> sum + n end)

    for share <- shares do
      # A little less than the product, for 0.07 * 100 is more than 7.
      rank = (share * count - 1.0e-9) |> Float.ceil() |> trunc() |> max(1) |> min(count)
      middle(at_rank(counts, rank))
    end
  end

  defp at_rank([{bucket, _n}], _rank), do: bucket
  defp at_rank([{bucket, n} | _rest], rank) when rank <= n, do: bucket
  defp at_rank([{_bucket, n} | rest], rank), do: at_rank(rest, rank - n)

  defp middle(bucket) do
    shift = ((bucket + @first) >>> 4) - 1
    low = (bucket + @first - (shift <<< 4)) <<< shift
    low + (((1 <<< shift) - 1) >>> 1)
  end
end
