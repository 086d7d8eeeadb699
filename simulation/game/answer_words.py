"""The words with which a text states its author's number, by language, for answer_parser.py.

Every entry is a regular expression of alternatives, in lower case.
"""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """The patterns of one language.

    Attributes:
        labels: Labels before a colon and the author's number: "answer", "my final choice".
        owns: Beginnings of a sentence that only states the number: "my number is".
        states: Beginnings that are accepted only if the statement is the whole text: "i choose".
        around: Patterns before and after the number, accepted like `states`: "을 선택합니다".
        comma: Whether 33,5 is a number (default: yes).
    """

    labels: str
    owns: str
    states: str
    around: tuple[str, str] = ("(?!)", "")
    comma: bool = True


_NAMES = "number|answer|choice|pick|decision|selection|response|bid|guess"

LANGUAGES = {
    "en": Words(
        labels=rf"(?:so |here is |here's )?(?:my |the )?(?:own |new )?(?:chosen |selected |final "
        rf"|definitive )*(?:{_NAMES})"
        "(?: for (?:this|the current) round)?",
        owns=rf"my (?:own |chosen |new |final )*(?:{_NAMES})(?: for (?:this|the current) round| this (?:time"
        rf"|round)| now)?"
        r" (?:is|will be|would be|remains)|(?:the |my )?final (?:answer|number|choice|decision|guess|pick)"
        r"(?: for this round)? is",
        states=r"i(?:'ll| will| would|'d| now| therefore| finally| hereby| personally| just| still)*"
        r" (?:choose|pick|select|go (?:with|for)|submit|play|opt for|settle (?:on|for)|name|enter|propose|decide on"
        r"|stick (?:with|to)|stay (?:with|at)|keep|say|guess|answer|take)"
        r"|i(?:'m| am)(?: now| therefore| just)? (?:going (?:to (?:choose|pick|select|go with|submit|say)|with|for)"
        r"|choosing|picking|selecting|submitting|sticking with|settling (?:on|for))"
        r"|i(?:'ve| have) (?:decided on|settled on)|i (?:think|guess|believe) i(?:'ll| will|'d| would)?"
        r" (?:choose|pick|say|go (?:with|for))|i(?:'d| would) like to (?:choose|pick|go with|submit)"
        r"|let(?:'s| me) (?:go with|pick|choose)|the (?:answer|number|best (?:number|choice|guess|answer)) is"
        r"|the number (?:that )?i(?:'ll| will| would)? (?:choose|pick|give|submit)(?: now)? is",
        comma=False,
    ),
    "de": Words(
        labels="(?:meine |die )?(?:endgültige )?(?:zahl|antwort|wahl|entscheidung)",
        owns="meine (?:gewählte |endgültige )?(?:zahl|antwort|wahl|entscheidung) (?:ist|lautet)",
        states="ich (?:wähle|nehme|bleibe bei|entscheide mich für|sage|tippe(?: auf)?|setze(?: auf)?)"
        "(?: daher| also| deshalb| jetzt| nun)?|(?:wähle|nehme) ich(?: jetzt| nun)?|mein tipp (?:ist|lautet)"
        "|die (?:zahl|antwort) (?:ist|lautet)",
    ),
    "fr": Words(
        labels="(?:mon |ma )?(?:nombre|chiffre|choix|réponse)(?: finale?| définitive)?",
        owns="(?:mon (?:nombre|choix|chiffre)|ma (?:réponse|décision))(?: final[e]?| définitive)? est",
        states="je (?:choisis|prends|propose|opte pour|joue|sélectionne|dis|réponds|mise sur|vais"
        " (?:choisir|prendre|jouer))(?: donc| finalement)?|la réponse est",
    ),
    "es": Words(
        labels="(?:mi )?(?:número|respuesta|elección)(?: final)?",
        owns="mi (?:número|elección|decisión|respuesta)(?: final)? (?:es|será)",
        states="(?:yo )?(?:elijo|escojo|opto por|selecciono|me quedo con|voy a (?:elegir|escoger)|elegiré"
        "|propongo|digo)"
        "|el número que elijo es|la respuesta es",
    ),
    "it": Words(
        labels="(?:il mio |la mia )?(?:numero|risposta|scelta)(?: finale)?",
        owns="(?:il mio numero|la mia (?:risposta|scelta))(?: finale)? è",
        states="(?:io )?(?:scelgo|prendo|opto per|seleziono|propongo|gioco|sceglierò|dico|punto su)|la risposta è",
    ),
    "pt": Words(
        labels="(?:o meu |a minha )?(?:número|resposta|escolha)(?: final)?",
        owns="(?:(?:o )?meu número|(?:a )?minha (?:resposta|escolha))(?: final)? é",
        states="(?:eu )?(?:escolho|opto por|seleciono|fico com|vou escolher|proponho|digo|aposto em)|a resposta é",
    ),
    "nl": Words(
        labels="(?:mijn )?(?:definitieve |uiteindelijke )?(?:getal|nummer|antwoord|keuze)",
        owns="mijn (?:definitieve |uiteindelijke )?(?:getal|nummer|antwoord|keuze) is",
        states="ik (?:kies|neem|ga voor|zeg|gok(?: op)?)(?: nu)?(?: voor)?|(?:kies|neem) ik(?: nu)?(?: voor)?"
        "|het antwoord is",
    ),
    "pl": Words(
        labels="(?:moja |mój )?(?:ostateczna )?(?:liczba|odpowiedź|wybór|decyzja)",
        owns="(?:moja (?:ostateczna )?(?:liczba|odpowiedź|decyzja)|mój wybór) (?:to|jest)",
        states="(?:ja )?(?:wybieram|biorę|podaję|mówię|stawiam(?: na)?|typuję)|mój typ to",
    ),
    "ru": Words(
        labels="(?:мо[йеё] )?(?:окончательный |итоговый )?(?:число|ответ|выбор|номер)",
        owns="мо[йеё] (?:окончательный |итоговый )?(?:число|ответ|выбор|номер)(?: это)?(?: [—–-])?",
        states="(?:я )?(?:выбираю|беру|называю|выберу|назову|ставлю(?: на)?|отвечаю|говорю)",
    ),
    "uk": Words(
        labels="(?:моє )?число|(?:моя )?(?:остаточна )?відповідь|(?:мій )?вибір",
        owns="(?:моє число|моя (?:остаточна )?відповідь|мій вибір)(?: це)?(?: [—–-])?",
        states="(?:я )?(?:обираю|вибираю|виберу|оберу|називаю|кажу)",
    ),
    "tr": Words(
        labels="(?:benim )?(?:nihai |son )?(?:sayı|cevap|yanıt|sayım|cevabım|yanıtım|seçimim|tahminim)",
        owns="(?:benim )?(?:nihai |son )?(?:sayım|cevabım|yanıtım|seçimim)",
        states="seçtiğim sayı|(?:benim )?tahminim",
        around=("(?:ben )?", r"(?:'\w{1,3})? (?:sayısını )?(?:seçiyorum|seçerim)"),
    ),
    "sv, da, no": Words(
        labels="(?:mitt? )?(?:slutgiltiga? |endelige? |endeligt )?(?:tal|tall|svar|val|valg)",
        owns="mitt? (?:slutgiltiga? |endelige? )?(?:tal|tall|svar|val|valg) (?:är|er|blir)",
        states="(?:jag|jeg) (?:väljer|vælger|velger|tager|tar|säger|siger|sier)"
        "|(?:väljer|vælger|velger|tar) (?:jag|jeg)",
    ),
    "id": Words(
        labels="(?:angka|jawaban|pilihan)(?: akhir)?(?: saya)?",
        owns="(?:angka|jawaban|pilihan)(?: akhir)? saya adalah",
        states="saya (?:akan )?(?:memilih|pilih)|jawabannya adalah",
    ),
    "vi": Words(
        labels="(?:số|câu trả lời|đáp án|lựa chọn)(?: cuối cùng)?(?: của tôi)?",
        owns="(?:số|câu trả lời|lựa chọn|đáp án)(?: cuối cùng)? của tôi là",
        states="tôi (?:sẽ )?(?:chọn|đoán)(?: số)?|số tôi chọn là",
    ),
    "zh": Words(
        labels="(?:我的)?(?:最[终終])?(?:数字|數字|答案|选择|選擇|回答)",
        owns="我(?:这一轮)?的(?:最[终終])?(?:数字|數字|答案|选择|選擇|回答)(?:是|为|為)|(?:我的)?最[终終]答案(?:是|为|為)",
        states="(?:这次|这一轮|本轮|现在|這次|這一輪)?我(?:就|会|會|要|将|將)?(?:选择|選擇|选|選|決定选择|决定选|猜|出)"
        "(?:的)?(?:数字|數字)?(?:是|为|為)?|(?:数字|數字|答案)(?:是|为|為)",
        comma=False,
    ),
    "ja": Words(
        labels="(?:私の)?(?:最終(?:的な)?)?(?:答え|数字|回答)",
        owns="(?:私の|私が選ぶ)(?:最終(?:的な)?)?(?:数字|答え|選択|回答)は",
        states="(?:数字|答え|回答)は|私は",
        around=("(?:(?:私は|僕は)、?)?", "を(?:選びます|選択します)|に(?:します|決めます)"),
        comma=False,
    ),
    "ko": Words(
        labels="(?:제 )?(?:최종 )?(?:답|숫자|정답|답변)",
        owns="(?:제|저의|내|나의) (?:최종 )?(?:숫자|답|선택|대답|답변|번호)(?:은|는)|최종 (?:답변?|숫자)(?:은|는)",
        states="(?:답|숫자)은",
        around=(
            "(?:(?:저는|나는|제가) )?(?:숫자 )?",
            "번?(?:을|를|으로|로)? ?(?:선택합니다|선택하겠습니다|선택할게요|고르겠습니다|고릅니다)",
        ),
        comma=False,
    ),
    "ar": Words(
        labels="(?:الجواب|الإجابة)(?: النهائية?)?|إجابتي|رقمي|اختياري|جوابي",
        owns="(?:رقمي|إجابتي|اختياري|جوابي)(?: هو| هي)?",
        states="(?:أنا )?(?:أختار|سأختار|أقول)|(?:الرقم|العدد) الذي أختاره هو",
        comma=False,
    ),
    "hi": Words(
        labels="(?:मेर[ाी] )?(?:अंतिम )?(?:उत्तर|नंबर|जवाब|चुनाव|संख्या|अंक)",
        owns="मेर[ाी] (?:अंतिम )?(?:उत्तर|नंबर|जवाब|चुनाव|संख्या|अंक)(?: है)?",
        states="उत्तर",
        around=("मैं (?:संख्या |नंबर )?", " (?:को )?(?:चुनत[ाी] हू[ँं]|चुनू[ँं]ग[ाी])"),
        comma=False,
    ),
}
OPENING = (  # words allowed before a statement that do not change it
    "so|therefore|thus|hence|ok(?:ay)?|well|sure|alright|all right|yes|great|and|now|this time|finally|ultimately"
    r"|again|in conclusion|(?:in |for )?this round|(?:in|for) (?:round \d{1,4}|the \d{1,4}(?:st|nd|rd|th) round)"
    "|assistant|me|gerne|bien sûr|claro|хорошо|also|daher|deshalb|diesmal|jetzt|donc|bon|maintenant|por eso|bueno"
    "|ahora|quindi|ora|portanto|agora"
    "|daarom|dus|więc|dlatego|поэтому|итак|значит|тому|отже|bu yüzden|bu turda|derfor|därför|jadi"
    "|vì vậy|所以|因此|好的?"
    "|だから|よって|では|그래서|따라서|لذلك|इसलिए"
)
SUPPOSING = (  # beginnings of a sentence that may introduce a supposition or another player's answer
    "here is (?:how|what)|suppos|imagin|pretend|let us|let's|let me|consider\\b|for (?:example|instance)|e\\.g|assum"
    "|say\\b|what if|in the case|put your|picture|if\\b|(?:mal )?angenommen|stell|nehmen wir|zum beispiel|z\\.b"
    "|versetz"
    "|gesetzt|denken|wenn\\b|mettons|admet|si\\b|par exemple|supon|supong|por ejemplo|suppon|immagin|ad esempio|se\\b"
    "|por exemplo|stel|laten we|bijvoorbeeld|als\\b|załóżmy|powiedzmy|na przykład|jeśli|допустим|предпол|предста"
    "|например|если|припуст|якщо|diyelim|varsay|örneğin|eğer|anta|låt oss|lad os|till exempel|for eksempel|om\\b|hvis"
    "|misal|andai|jika|giả sử|hãy|ví dụ|nếu|假设|假設|假如|假定|设想|想象|如果|例如|もし|仮に|例えば|만약|가정|예를"
    "|لنفترض|تخيل|إذا|मान ल|अगर"
)
HEADINGS = (  # headings before a colon and the author's own words
    r"(?:step|level|schritt|étape|paso|passo|etap|шаг|步骤|ステップ) ?\d*|\d+|reason(?:ing|s)?|explanation|analysis"
    r"|conclusion"
    "|calculation|strategy|note|begründung|raisonnement|explication|razonamiento|explicación|ragionamento|spiegazione"
    "|raciocínio|理由|推理|分析"
    "|(?:(?:expected|estimated|likely|the|my) )*(?:average|mean|target|estimate|confidence|ratio|two[- ]thirds"
    "|durchschnitt"
    "|ziel|moyenne|cible|promedio|objetivo|media|obiettivo|média|alvo|gemiddelde|doel|średnia|среднее|平均|目标)"
    r"(?: \([^:()]*\))?"
)
LEADING = (  # lines after which a number may belong to another player or a template
    r".*\b(?:example|sample|format|like this|as follows|following|below|statement|answers?|says|replies|turn"
    r"|announced"
    r"|result|smiles|final number)\W*$|.*(?:player|spieler|joueur|jugador|giocatore|jogador|speler|gracz|игрок"
    r"|oyuncu|玩家|プレイヤー|플레이어|لاعب) ?\d"
    r"|.*(?:na[iï]ve|ingenu|初级|新手)"
    r"|.*\b(?:winning|winner|solve|compute|has to|please|you (?:can|should|must))\b"
    r"|.*(?:average|mean|durchschnitt|moyenne|promedio|media|média|gemiddelde|średni\w*|среднее|平均数?)\W*$"
)
THE_NUMBER = (  # words allowed between a statement and its number
    "(?:the |a )?(?:whole )?(?:number|value|integer)|the|(?:die )?zahl|die|le(?: nombre| chiffre)?|nombre"
    "|el(?: número)?"
    "|número|il(?: numero)?|numero|o(?: número)?|het(?: getal)?|getal|liczbę|число|số|angka|talet|tallet"
    "|(?:ال)?(?:عدد|رقم)|数字|數字"
)
UNITS = r"(?: ?(?:%|points?|percent|€|\$|punkte|puntos|punti|pontos|点|分))?"
CLOSING = (  # words allowed after a stated number
    "(?:です|だ|にします|とします| ?(?:입니다|이다|예요|이에요)| है"
    "|,? (?:i think|i guess|please|for this round|this (?:round|time))"
    r"| \(final\))?"
)
